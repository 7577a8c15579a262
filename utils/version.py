"""The version of the project; that of the two packages in submodules/ and of CITATION.cff is the same (a test compares
them)."""

VERSION = "0.1.0"
