"""The formats that image-text data comes in, one module each."""
