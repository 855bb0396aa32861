"""Linear attention: a feature map in the place of the softmax, so that keys and values are summed once for all queries."""
