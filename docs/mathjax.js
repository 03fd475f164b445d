window.MathJax = { options: { enableMenu: false } }; // its menu would load what is not here
