"""The commands of ``metapool``: a file each."""
