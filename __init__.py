"""Palimpsest: train, measure, sample and classify with discrete diffusion language models."""
