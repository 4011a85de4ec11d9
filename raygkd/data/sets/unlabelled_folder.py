"""Folders of images without labels."""

from __future__ import annotations

from raygkd.data.faults import Faults
from raygkd.data.image_files import image_files, known_suffixes, read_of
from raygkd.data.sources import DataSet, Sample, Source, SourceOptions, existing_folder
from raygkd.data.splits import NO_LABEL
from raygkd.data.unlabelled import UNLABELLED
from raygkd.errors import DataError
from raygkd.registry import DATASETS


@DATASETS.register("unlabelled")
class Unlabelled(DataSet):
    """Images without labels, in a folder or in folders below it."""

    task = "classification"

    def open(self, options: SourceOptions) -> Source:
        """Return every image below the folder; the names of folders mean nothing."""
        root = existing_folder(UNLABELLED, options)
        faults = Faults(options.strict)
        paths = image_files(root, faults)
        if not paths:
            raise DataError(f"no images in '{root}' ({known_suffixes()})")
        samples = [Sample(NO_LABEL, "train", str(path), read_of(path)) for path in paths]
        return Source(UNLABELLED, (), samples, faults.warnings())
