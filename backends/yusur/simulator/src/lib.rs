//! A network processor in software, as the shared library that dpumesh-yusur loads.
