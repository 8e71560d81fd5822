# What a developer runs: `make` lists it. Everything is built under .local/; nothing outside it changes, except that
# `make mariadb` installs Debian's package of the MariaDB server where there is none.

SALT ?= 3008

# One release of each series that resolves from PyPI together with its dependencies.
PIN_3006 := salt==3006.28
PIN_3007 := salt==3007.15
PIN_3008 := salt==3008.3
PIN := $(PIN_$(SALT))
ifeq ($(PIN),)
$(error SALT=$(SALT) is not known here: 3006, 3007 or 3008)
endif

ENV := .local/env-$(SALT)
PY := $(ENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
STAMP := $(ENV)/.installed
# With a C driver in it saltext.mysql behaves as its users' does, and not as the tests need it.
BENCH_ENV := .local/bench-$(SALT)
BENCH_STAMP := $(BENCH_ENV)/.installed

# The server's programs live where ordinary users have no PATH.
export PATH := $(PATH):/usr/sbin:/usr/local/sbin
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
APT := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get
APT_INSTALL := $(APT) install -q -y --no-install-recommends

.DEFAULT_GOAL := help
.PHONY: help env mariadb mysql drivers lint test test-salt test-mysql test-faults fuzz mutants demo demo-up demo-down bench bench-quick clean

help: ## List the targets
	@echo "Two to begin with: make demo, make test."
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "SALT=3006, SALT=3007 or SALT=3008 (the default) chooses the series of Salt: make demo SALT=3006"

env: $(STAMP) ## Build the virtual environment of the series

$(STAMP): pyproject.toml Makefile tools/find-python tools/timelib/pyproject.toml
	@$(PIP) --version >/dev/null 2>&1 || { python=$$(tools/find-python $(SALT)) && "$$python" -m venv --clear $(ENV); }
	@echo "Installing $(PIN) and this package into $(ENV)"
	@$(PIP) install --upgrade pip
	@$(PIP) install '$(PIN)' ./tools/timelib -e '.[test,lint]'
	@$(PIP) install --no-deps saltext.mysql==1.1.0  # its dependencies name drivers that nothing here needs
	@touch $@

# mariadb-install-db calls my_print_defaults, which Debian has put into the client's package. Older Ubuntu releases put
# the version into the packages' names. galera-4 is for the tests of a Galera node, which are skipped without it.
mariadb: ## Make sure that the MariaDB server's programs are installed
	@{ command -v mariadbd && command -v mariadb-install-db && command -v my_print_defaults; } >/dev/null || { \
	    { command -v apt-get && command -v $(or $(SUDO),true); } >/dev/null || { \
	        echo "The MariaDB server's programs are missing. Installing them needs apt-get, and root or sudo;" >&2; \
	        echo "or have them installed: mariadb-server-core and mariadb-client-core are Debian's names." >&2; \
	        exit 1; \
	    }; \
	    echo "Installing MariaDB's server programs"; \
	    $(APT) update -q && { \
	        $(APT_INSTALL) mariadb-server-core mariadb-client-core || { \
	            version=$$(apt-cache search --names-only '^mariadb-server-core-[0-9.]+$$' | \
	                sed 's/^mariadb-server-core-\([0-9.]*\).*/\1/' | sort -V | tail -n 1); \
	            $(APT_INSTALL) "mariadb-server-core-$$version" "mariadb-client-core-$$version"; \
	        }; \
	        $(APT_INSTALL) galera-4 || true; \
	    }; \
	}

lint: env ## Check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict salt_mysql_engine

test: env mariadb lint ## Run everything: lint, unit, integration and system tests
	$(PY) -m pytest

test-salt: env mariadb ## Run the system tests alone, as in: make test-salt SALT=3006
	$(PY) -m pytest tests/system $(ARGS)

mysql: ## Make sure that there is a MySQL server: MYSQLD=..., an installed one, or Debian unstable's under .local/mysql
	@tools/find-mysqld

test-mysql: env mysql ## Run the integration tests against MySQL in MariaDB's place
	SERVER=mysql $(PY) -m pytest tests/integration $(ARGS)

test-faults: env mariadb ## Run the whole fault suite: outages, crashes, bad rows, gaps, full disks (15 minutes)
	HYPOTHESIS_PROFILE=faults $(PY) -m pytest --long -m faults -n 2 --dist loadfile

fuzz: env mariadb ## Send events of all kinds through it, and look at every row: make fuzz EVENTS=1000000 (half an hour)
	$(PY) -m tests.fuzz --events $(or $(EVENTS),1000000) $(if $(SEED),--seed $(SEED)) $(ARGS)

mutants: env mariadb ## Change the core in SAMPLE=200 places, one at a time, and list what no test notices (an hour or two)
	$(PY) -m tests.mutants --sample $(or $(SAMPLE),200) $(if $(SEED),--seed $(SEED)) $(ARGS)

demo: env mariadb ## See it work: a database, a master, two minions, real jobs, then the rows; stops at the end
	@$(PY) -m demo

demo-up: env mariadb ## The same, left running, with the commands to play with
	@$(PY) -m demo up

demo-down: env ## Stop what demo-up left running
	@$(PY) -m demo down

# mysqlclient comes as source alone.
drivers: ## Make sure that what the peers of the benchmarks are built with is installed
	@{ command -v cc && pkg-config --exists libmariadb; } >/dev/null 2>&1 || { \
	    command -v apt-get >/dev/null || { \
	        echo "mysqlclient is built from source: a C compiler, pkg-config, Python's and MariaDB's headers are missing." >&2; \
	        exit 1; \
	    }; \
	    echo "Installing what mysqlclient is built with"; \
	    $(APT) update -q && $(APT_INSTALL) gcc libc6-dev pkg-config libmariadb-dev python3-dev; \
	}

$(BENCH_STAMP): pyproject.toml Makefile tools/find-python tools/timelib/pyproject.toml | drivers
	@python=$$(tools/find-python $(SALT)) && "$$python" -m venv --clear $(BENCH_ENV)
	@echo "Installing $(PIN), this package and its peers into $(BENCH_ENV)"
	@$(BENCH_ENV)/bin/python -m pip --disable-pip-version-check --quiet install --upgrade pip
	@$(BENCH_ENV)/bin/python -m pip --quiet install '$(PIN)' ./tools/timelib -e '.[test,bench]'
	@$(BENCH_ENV)/bin/python -m pip --quiet install --no-deps saltext.mysql==1.1.0
	@touch $@

bench: $(BENCH_STAMP) mariadb ## Measure everything beside its peers, and write benchmarks/RESULTS.md and the plots (23 minutes)
	$(BENCH_ENV)/bin/python -m benchmarks --save $(ARGS)

bench-quick: $(BENCH_STAMP) mariadb ## Measure little, and fail where a ratio is worse than the committed one by a quarter (4 minutes)
	$(BENCH_ENV)/bin/python -m benchmarks --quick $(ARGS)

clean: ## Remove what was built here
	rm -rf .local build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
