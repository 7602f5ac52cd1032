"""Published experiments on learning dynamics and IFT, small enough for two CPU cores."""
