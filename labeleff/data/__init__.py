"""From files to batches: manifests, splits, the prepared store, annotations, sampling and augmentation."""
