confirm {
  ask = "always"
}
deny {
}
