"""What frozen text encoders know: the three experiments of Chen et al. 2023, with pools chosen and intervals given."""
