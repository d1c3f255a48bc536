"""Generation and inference of one iteration: who generates and scores what, where and when."""
