"""Responses that a policy samples and rewards score, as data sets to train on."""
