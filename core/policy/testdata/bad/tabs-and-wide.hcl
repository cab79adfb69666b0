host "*" {
	deny {
		reason = "日本語" + "‮"
	}
}
