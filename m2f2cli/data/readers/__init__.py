"""Labelled data sets in the layouts the field uses."""
