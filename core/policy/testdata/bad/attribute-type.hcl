host "*" {
  share = "yes"
  via   = "bastion"
  confirm {
    on  = "exec"
    ask = ["always"]
  }
  persist {
    prewarm = "true"
    idle    = 600
  }
}
host "x" {
  via = [22, ""]
}
host "y" {
  via = [""]
}
