host "" "a b" "a,b" "!" "!!x" "10.0.0.0/8" "b*ü.example" {
}
