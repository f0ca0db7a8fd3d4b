"""The shipped configuration groups (installed as the package `mmft.conf`)."""
