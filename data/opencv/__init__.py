"""``DATA.BACKEND opencv``: images read and augmented by OpenCV."""
