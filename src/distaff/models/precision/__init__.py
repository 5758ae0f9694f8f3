"""Mixed precision: products and convolutions in half precision, all else in float32."""
