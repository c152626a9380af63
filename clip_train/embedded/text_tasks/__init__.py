"""What made `clip_train/embedded/texts`: text tasks from WordNet, the Unicode CLDR and captions of clip art."""
