"""Cases that measure speed and memory of a part, and the study that trains and judges kinds of attention."""
