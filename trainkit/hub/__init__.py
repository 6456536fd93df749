"""Share models, datasets and samples on the Hub: pushed in one commit, in the background of a run or by push.py."""
