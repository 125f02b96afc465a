"""The version of the package, for files, reports and `revify --version`."""

__version__ = "0.1.0"
