host "* {
  share = true
}
