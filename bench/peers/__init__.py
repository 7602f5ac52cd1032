"""What is compared: each implementation in its best mode, and the released IFT algorithm."""
