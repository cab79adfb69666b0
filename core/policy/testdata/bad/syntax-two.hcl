host "a" {
  share = = true
}
host "b" {
  via = ["x"
}
