"""Training: a teacher that answers, learners that share its answers, the loop around them."""
