"""Writers of models in other formats, a file each."""
