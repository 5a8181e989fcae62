"""From rows to numbers: examples, models, training, evaluation, report, prediction."""
