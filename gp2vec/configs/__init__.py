"Hydra configuration of gp2vec: `config.yaml` and its groups data, model, train and experiment."
