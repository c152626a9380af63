"""Sets of pictures with labels or captions, read by number: of shards, folders, torchvision, `datasets`."""
