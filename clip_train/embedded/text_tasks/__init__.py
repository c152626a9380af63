"""The scripts that made `clip_train/embedded/texts`: text tasks from WordNet, the Unicode CLDR and clip-art captions."""
