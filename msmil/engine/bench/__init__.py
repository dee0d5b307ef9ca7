"""What training costs on this machine, and what it would cost on more of them."""
