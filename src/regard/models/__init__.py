"""placeholder: being written"""
def create_model(*a, **k): raise NotImplementedError
def list_models(*a, **k): raise NotImplementedError
def load_checkpoint(*a, **k): raise NotImplementedError
