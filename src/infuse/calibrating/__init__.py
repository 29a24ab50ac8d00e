"""Calibrating: confidences that mean what they say, and a threshold below which a text is out of scope."""
