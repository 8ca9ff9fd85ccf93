"""Evaluation by generation: what a pair answers from compressed memory, beside full text and beside truncation."""
