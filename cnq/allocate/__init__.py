"""The best types for a size: what each tensor's rounding does to its outputs, what that does to the model, and the choice.

scan.py measures the first, gains.py the second, knapsack.py chooses, recipe.py keeps the choice, gate.py proves it.
"""
