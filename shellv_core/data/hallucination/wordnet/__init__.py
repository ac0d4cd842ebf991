"""A table of word relations derived from WordNet 3.0."""
