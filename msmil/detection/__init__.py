"""Where a model looks: maps in stored pixels, and how often their peak lies in a box."""
