"""Other people's weights: read without executing anything, understood, converted, accounted for."""
