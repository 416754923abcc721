"""Raw files to batches: readers, shards, order, transforms, loader."""
