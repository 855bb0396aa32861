"""placeholder"""
def supports(call): return "x"
