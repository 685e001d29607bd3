"""The capstone: choosing a method under a budget, and a leaderboard on cards with hidden references.

`budget` computes costs, `choosing` compares methods, `hidden` has the cards, `leaderboard` scores entries.
"""
