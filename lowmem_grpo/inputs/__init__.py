"""The inputs of a training, read and checked before any long work: model, data, rewards, folders, plan."""
