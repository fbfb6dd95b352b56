"""What a student has of its teacher beyond accuracy: one file per measure, plain functions.

After Ojha et al., "What Knowledge Gets Distilled in Knowledge Distillation?", NeurIPS 2023 (arXiv:2205.16004), who ask
whether a student is fooled by the same images as its teacher, ignores the same changes and errs alike. The stage
`knowledge` asks all of it at once.
"""
