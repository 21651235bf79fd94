"""Evaluation: what a model is asked, how its answers are judged, and the figures that come out."""
