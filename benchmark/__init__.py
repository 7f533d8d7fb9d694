"""The benchmark and the campaign of faults, on the stand-in."""
