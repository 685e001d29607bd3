"""The capstone: choosing a method under a budget, and a leaderboard on cards whose texts nobody has seen.

`budget` says what a method costs, `choosing` picks one, `hidden` has the cards, `leaderboard` keeps the score.
"""
