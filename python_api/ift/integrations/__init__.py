"""Drop-ins for training libraries. Each module needs its library; importing `ift` needs none."""
