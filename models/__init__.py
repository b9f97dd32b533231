"""What a recommender is: data, catalogue, trie, prompt, search, checkpoint, training and evaluation."""
