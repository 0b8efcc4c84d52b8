"""`svd2 eval`: how good the pictures of a checkpoint are, in numbers; docs/evaluation.md defines each of them."""
