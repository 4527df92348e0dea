"""What a quantized net is made of: quantizers, the layers around which they sit, rules, hooks, and the surgery."""
